"""Interview preparation: a bank of questions whose numbers are measured or computed."""
