"""Weights and statistics of a layer in, loss at every rank and the factors of any plan out."""
