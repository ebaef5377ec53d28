"""minipeft: parameter-efficient fine-tuning from scratch, one short module per technique."""
