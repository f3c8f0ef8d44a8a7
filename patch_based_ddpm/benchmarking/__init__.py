"""Memory and speed of training and sampling, measured on this machine beside baseline networks.

`baseline_unet` is the network without our optimisations, `measure` takes the figures, `report` and `plot` show them.
`suite` measures a whole GPU, with the `variants` of a training step.
"""
