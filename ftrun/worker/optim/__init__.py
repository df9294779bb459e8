"""The mathematics of ftrun's own optimizers: rules by which weights are updated, and what applies them."""
