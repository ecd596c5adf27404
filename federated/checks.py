"""What can be said against the settings of a run before anything of it runs."""

import inspect
from collections.abc import Mapping
from typing import Any

from pytorch_lightning import Trainer

from federated.client import NOISY_CLASSIFIER
from federated.local_fit import DECIDED
from federated.roles import CLIENT
from federated.settings import Role, Settings

# Arguments of the data that the run sets.
_SET_BY_RUN = ("source", "pseudo_labels", "synthetic_images")


def check(settings: Settings) -> None:
    """Refuse settings that do not fit together.

    Args:
        settings: The run.

    Raises:
        ValueError: An argument contradicts another one, or is set by the run.
    """
    for name in ("classifier", "noisy_classifier", "generator"):
        role = getattr(settings, name)
        if role is not None:
            _check_role(name, role)
    _check_arms(settings)
    _check_noisy_classifier(settings)
    _check_clients(settings)


def _check_role(name: str, role: Role) -> None:
    for argument in _SET_BY_RUN:
        given = _arguments(role.data).get(argument)
        if given is not None:
            msg = (
                f"Expected `{name}.data.init_args.{argument}` to be left out, got {given!r}; the run sets it (`source` "
                "is an entry of its own, `arms` say what is trained on)."
            )
            raise ValueError(msg)
    known = inspect.signature(Trainer).parameters.keys() - DECIDED
    unknown = sorted(role.trainer.keys() - known)
    if unknown:
        msg = (
            f"Expected `{name}.trainer` to hold arguments of the Trainer that a run does not decide, got "
            f"{', '.join(unknown)}; rounds and epochs are entries of the role, leave the others out."
        )
        raise ValueError(msg)


def _check_arms(settings: Settings) -> None:
    drawn = [arm for arm in settings.arms if "drawn" in arm]
    if drawn and settings.generator is None:
        msg = f"Expected a `generator` for `arms` with drawn images ({', '.join(drawn)}), got none; configure one."
        raise ValueError(msg)
    if len(set(settings.arms)) < len(settings.arms) or not settings.arms:
        msg = f"Expected `arms` to name at least one classifier, and each once, got {settings.arms}; repair the list."
        raise ValueError(msg)


def _check_noisy_classifier(settings: Settings) -> None:
    arguments = {} if settings.generator is None else _arguments(settings.generator.model)
    source = arguments.get("classifier_from")
    trained = f"{CLIENT}/{NOISY_CLASSIFIER}"
    if arguments.get("weighting") == "posterior" and source is None:
        msg = (
            "Expected `generator.model.init_args.classifier_from` for `weighting: posterior`, got none; configure "
            f"`noisy_classifier` and give {trained!r}, or take `weighting: none`."
        )
        raise ValueError(msg)
    if source == trained and settings.noisy_classifier is None:
        msg = f"Expected a `noisy_classifier` for `classifier_from` {trained!r}, got none; configure one."
        raise ValueError(msg)
    if source != trained and settings.noisy_classifier is not None:
        msg = (
            f"Expected `generator.model.init_args.classifier_from` to be {trained!r} where there is a "
            f"`noisy_classifier`, got {source!r}; give it, or set `noisy_classifier: null`."
        )
        raise ValueError(msg)


def _check_clients(settings: Settings) -> None:
    if settings.split is None:
        if settings.engine != "deployment":
            msg = (
                f"Expected a `split` for `engine` {settings.engine}, got null; clients with data of their own run on "
                "SuperNodes (`engine: deployment`)."
            )
            raise ValueError(msg)
        return
    least, clients = settings.communication.min_clients, settings.split.num_clients
    if least > clients:
        msg = (
            f"Expected `communication.min_clients` to be at most `split.num_clients`, got {least} of "
            f"{clients} clients; lower it."
        )
        raise ValueError(msg)


def _arguments(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("init_args") or {}
