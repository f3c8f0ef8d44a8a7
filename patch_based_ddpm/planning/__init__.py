"""How much memory a model needs.

`live_memory` measures the peak of running code, by kind of tensor. `planner` predicts the peak of training and sampling
by running their code on fake tensors, and finds the most patches per pass that fit.
"""
