"""What the techniques share and no paper describes: attaching to a model, checking, removing."""
