"""Any classifier of timm, with its normalisation inside."""

from typing import Any

import timm
from torch import Tensor, nn

from lightning_modules.networks.normalise import Normalise


class TimmClassifier(nn.Module):
    """A model of timm by name, for images in [0, 1]; it normalises by the mean and std it was made for.

    Args:
        name: Name of the model, such as "resnet18" or "vit_small_patch16_224" (`timm.list_models()`).
        pretrained: Start from timm's weights, which are downloaded once.
        num_classes: Outputs; None until `reset_classifier` (SSLClassifier calls it), 0 for the pooled features
            (LinearProbe).
        in_channels: Channels of the images; pretrained weights of the first layer are adapted by timm.
        image_size: Side of the images, for models that need to know (vision transformers); None leaves timm's.
        drop_rate: Dropout before the last layer.
        drop_path_rate: Stochastic depth.

    Attributes:
        num_features: Channels of the pooled features.

    Raises:
        ValueError: timm has no such model.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        num_classes: int | None = None,
        in_channels: int = 3,
        image_size: int | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            near = ", ".join(timm.list_models(f"*{name.split('_')[0]}*")[:3])
            msg = f"Expected `name` to be a model of timm, got {name!r}; timm.list_models() lists them ({near}, ...)."
            raise ValueError(msg)
        options: dict[str, Any] = {"drop_rate": drop_rate, "in_chans": in_channels}
        options |= {"drop_path_rate": drop_path_rate} if drop_path_rate else {}
        options |= {"img_size": image_size} if image_size is not None else {}
        # timm's models have no common class with the methods used here.
        model: Any = timm.create_model(
            name, pretrained=pretrained, num_classes=1 if num_classes is None else num_classes, **options
        )
        self.model = model
        self.pretrained = pretrained
        self.num_classes = num_classes
        config = model.pretrained_cfg
        mean, std = config.get("mean", (0.5,)), config.get("std", (0.25,))
        if in_channels != len(mean):
            mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
        self.normalise = Normalise(mean, std)
        self.num_features = int(model.head_hidden_size)

    def reset_parameters(self) -> None:
        """Draw the weights anew; of a pretrained model only the last layer's."""
        if self.pretrained:
            self.reset_classifier(1 if self.num_classes is None else self.num_classes)
            return
        for part in self.model.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last layer by a new one.

        Args:
            num_classes: Its outputs.
        """
        self.num_classes = num_classes
        self.model.reset_classifier(num_classes)

    def embed(self, image: Tensor) -> Tensor:
        """Pooled features [B, num_features] of images [B, C, H, W] in [0, 1]."""
        features = self.model.forward_features(self.normalise(image))
        pooled: Tensor = self.model.forward_head(features, pre_logits=True)
        return pooled

    def classify(self, embedding: Tensor) -> Tensor:
        """Logits [B, K] of pooled features."""
        logits: Tensor = self.model.get_classifier()(embedding)
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """Logits [B, K] of images [B, C, H, W] in [0, 1]."""
        return self.classify(self.embed(image))
