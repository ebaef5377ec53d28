"""What every technique needs and no paper describes: put on a model, tried there, taken off."""
