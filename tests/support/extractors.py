"""A stand-in for Inception: a feature extractor without weights to download."""

import pytest
import torch

torch_fidelity = pytest.importorskip("torch_fidelity")


class MeanColours(torch_fidelity.FeatureExtractorBase):
    """An extractor that needs no weights: the mean of each channel, and of each half of the image."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **kwargs):
        super().__init__(name, features_list)
        self.weights = feature_extractor_weights_path

    @staticmethod
    def get_provided_features_list():
        return ("means",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "means"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, input):
        assert input.dtype == torch.uint8
        assert input.shape[1] == 3
        left, right = input.double().chunk(2, dim=3)
        return (torch.cat([left.mean((2, 3)), right.mean((2, 3))], dim=1),)
