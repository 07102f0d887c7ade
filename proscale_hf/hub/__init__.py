"""What leaves with a model and comes back: code, card, names, upload, registration with transformers."""
