"""Uses of a trained model: text generation, scoring, question answering, evaluation."""
