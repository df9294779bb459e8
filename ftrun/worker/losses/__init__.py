"""Losses as pure functions of log-probabilities, logits or scores, each with the paper it comes from."""
