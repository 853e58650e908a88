"""What a trained model is used for: generating text, scoring it, answering questions."""
