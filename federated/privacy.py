"""Central differential privacy of what clients train together, with Flower's wrapper."""

import math
import secrets
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from pytorch_lightning.utilities.seed import isolate_rng

from federated import wire
from federated.averaging import Arrays, average, digest
from federated.settings import Privacy
from federated.strategy import Contribution, CountedFedAvg, Plan

# Of the adaptive norm, as Andrew et al. 2021 recommend: step size, share of updates within the norm, and clients per
# standard deviation of the noise on their count.
_STEP = 0.2
_QUANTILE = 0.5
_CLIENTS_PER_STD = 20


class PrivateFedAvg(CountedFedAvg):
    """CountedFedAvg under client-level differential privacy of the trained parameters.

    Each client's update is clipped to the norm C, the updates of the m clients that answered are averaged with equal
    weights, and Gaussian noise of standard deviation z C / m is added (McMahan et al. 2018, arXiv 1710.06963), by
    Flower's DifferentialPrivacyServerSideFixedClipping. An `adaptive` C follows the median of the updates' norms, at
    the price of a little more noise (Andrew et al. 2021, arXiv 1905.03871).

    Tensors that are no trained parameters, such as the statistics of batch normalisation, are averaged without clipping
    and noise: they are not private. Nor are the numbers of images and the losses that clients tell the server.

    The noise is a function of (noise key, name, round), so that a run can be resumed. The server draws the key and
    tells nobody: who knows it can take the noise away.

    Args:
        plan: What is trained, and with whom.
        privacy: Clipping and noise.
        parameters: Names of the tensors that are trained.

    Attributes:
        clipping_norm: The norm C of the next round.
        noise_key: Decides the noise; another one for each network that is trained, or two results with the same noise
            would tell what is below it.
    """

    uniform = True

    def __init__(self, plan: Plan, privacy: Privacy, parameters: Collection[str]) -> None:
        super().__init__(plan)
        self.privacy = privacy
        self.parameters = frozenset(parameters)
        self.clipping_norm = privacy.clipping_norm
        self.noise_key = new_noise_key()

    def state(self) -> dict[str, float | str]:
        """What goes from round to round beside the weights: the clipping norm, and the key."""
        return {"clipping_norm": self.clipping_norm, "noise_key": self.noise_key}

    def restore(self, state: Mapping[str, float | str]) -> None:
        """Go on from what `state` gave.

        Args:
            state: It.
        """
        self.clipping_norm = float(state.get("clipping_norm", self.clipping_norm))
        self.noise_key = str(state.get("noise_key", self.noise_key))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Choose clients, and ask them to train, if their number allows for the noise.

        Args:
            server_round: The round, from 1 for this strategy's first one.
            arrays: The weights.
            config: What is trained.
            grid: Reaches the clients.

        Raises:
            TimeoutError: Too few clients are connected.
            ValueError: Too few clients for an adaptive norm, or a parameter is none of the weights.
        """
        strangers = sorted(self.parameters - arrays.keys())
        if strangers:
            msg = f"Expected `parameters` among the weights, got {strangers[0]!r}; give names of the state dict."
            raise ValueError(msg)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._noise_multiplier(len(messages))
        return messages

    def combine(self, number: int, sent: Arrays, entering: Sequence[Contribution]) -> Arrays:
        """Average clipped updates, and add noise.

        Args:
            number: The round, from 1 over all that were trained.
            sent: The weights that the clients began with.
            entering: What they trained, by client number; at least one.
        """
        others = {name: array for name, array in sent.items() if name not in self.parameters}
        found = average(others, [one.arrays for one in entering], [1.0] * len(entering))
        before = self._parameters_of(sent)
        states = [self._parameters_of(one.arrays) for one in entering]
        private = self._clipped_and_noised(number, before, states, entering)
        if self.privacy.adaptive:
            self._adapt(number, before, states)
        for name, array in private.items():
            found[name] = array.reshape(sent[name].shape).astype(sent[name].dtype)
        return {name: found[name] for name in sent}

    def _parameters_of(self, arrays: Arrays) -> Arrays:
        """The parameters, in float64 and the order sent, and flat: Flower does not clip arrays without an axis."""
        return {name: array.astype(np.float64).reshape(-1) for name, array in arrays.items() if name in self.parameters}

    def _clipped_and_noised(
        self, number: int, before: Arrays, states: Sequence[Arrays], entering: Sequence[Contribution]
    ) -> Arrays:
        # A NumPy number: a client that trained on nothing has an update of norm 0, by which Flower divides.
        norm = np.float64(self.clipping_norm)
        multiplier = self._noise_multiplier(len(entering))
        # Anew in each round: Flower's noise is for a fixed number of clients, but some may be missing. Its adaptive
        # wrapper is not used: that of 1.41 lowers the norm when too many updates are clipped, which clips yet more,
        # and takes the noise from the next round's norm.
        wrapper = DifferentialPrivacyServerSideFixedClipping(FedAvg(), multiplier, norm, len(entering))
        wrapper.current_arrays = _record(before)
        for one, arrays in zip(entering, states, strict=True):
            metrics = MetricRecord({wire.WEIGHT: 1})
            one.reply.content = RecordDict({wire.ARRAYS: _record(arrays), wire.METRICS: metrics})
        words = np.frombuffer(digest(self.noise_key, self.plan.name, number, "noise"), dtype="<u4")
        with isolate_rng(include_cuda=False), np.errstate(divide="ignore"):
            np.random.seed(words)  # noqa: NPY002 - Flower draws its noise there
            record, _ = wrapper.aggregate_train(number, [one.reply for one in entering])
        if record is None:
            msg = f"Expected Flower to average round {number} of `{self.plan.name}`, but it refused; look at its log."
            raise RuntimeError(msg)
        return {name: array.numpy() for name, array in record.items()}

    def _noise_multiplier(self, clients: int) -> float:
        """What remains for the weights when the count of clipped updates is noised, too: Andrew et al., theorem 1."""
        z = self.privacy.noise_multiplier
        if not self.privacy.adaptive or z == 0:
            return z
        std = clients / _CLIENTS_PER_STD
        if z >= 2 * std:
            msg = (
                f"Expected `privacy.noise_multiplier` below a tenth of the clients of a round ({clients}) with "
                f"`privacy.adaptive`, got {z}; take a fixed norm, or more clients."
            )
            raise ValueError(msg)
        return float((z**-2 - (2 * std) ** -2) ** -0.5)

    def _adapt(self, number: int, before: Arrays, states: Sequence[Arrays]) -> None:
        """C <- C exp(-eta (b - gamma)), where b is the noised share of updates within C (Andrew et al.)."""
        updates = [[state[name] - before[name] for name in before] for state in states]
        norms = [math.hypot(*(float(np.linalg.norm(part)) for part in update)) for update in updates]
        std = len(states) / _CLIENTS_PER_STD if self.privacy.noise_multiplier else 0.0
        words = np.frombuffer(digest(self.noise_key, self.plan.name, number, "count"), dtype="<u4")
        noise = np.random.default_rng(words).normal(0.0, std)
        share = (sum(norm <= self.clipping_norm for norm in norms) + noise) / len(states)
        self.clipping_norm *= math.exp(-_STEP * (share - _QUANTILE))


def new_noise_key() -> str:
    """Draw a key that nobody can guess."""
    return secrets.token_hex(32)


def _record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})
