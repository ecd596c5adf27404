"""The clients of a run, as the server knows them."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.serverapp import Grid
from torch import Tensor

from federated.secure_sum import unmask
from federated.settings import Communication
from federated.tasks import FitTask
from federated.wire import Answers, ask, connected

Int64Array = npt.NDArray[np.int64]

# Errors that an error tells of.
_TOLD = 3
# How often a sum is asked for anew because a client has gone.
_ATTEMPTS = 5


@dataclass(frozen=True)
class Member:
    """What a client says of itself.

    Attributes:
        client: Its number.
        node_id: Where Flower reaches it.
        class_names: Its classes.
        image_shape: Channels, height and width of its images.
        images: How many it has to train on.
        labeled: How many of them have a label.
        tested: How many it has to test on.
        public_key: Its key for secure sums.
    """

    client: int
    node_id: int
    class_names: tuple[str, ...]
    image_shape: tuple[int, ...]
    images: int
    labeled: int
    tested: int
    public_key: str


class Cohort:
    """Asks the clients of a run, and sums what no one may see.

    Args:
        grid: Reaches them.
        communication: Who is waited for.

    Raises:
        TimeoutError: Too few of them connect.
        RuntimeError: Too few of them answer.
        ValueError: They do not fit together.
    """

    def __init__(self, grid: Grid, communication: Communication) -> None:
        self.grid = grid
        self.communication = communication
        self.members: list[Member] = []
        self.describe()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes that all clients have."""
        return self.members[0].class_names

    @property
    def num_classes(self) -> int:
        """How many."""
        return len(self.class_names)

    @property
    def present(self) -> list[Member]:
        """Those that can be reached now: a node that is away would be waited for as long as for a slow one."""
        there = set(self.grid.get_node_ids())
        return [member for member in self.members if member.node_id in there]

    def describe(self) -> None:
        """Ask every client that is there who it is, and look whether they fit together."""
        nodes = connected(self.grid, self.communication)
        answers = ask(self.grid, dict.fromkeys(nodes), "query.describe", {}, timeout=self.communication.timeout)
        refused = {node: error for node, error in answers.errors.items() if node in answers.refused}
        if refused:
            raise ValueError(_told(refused))
        _tell(answers.errors)
        members = [
            Member(
                int(answer["client"]),
                answers.nodes[client],
                tuple(answer["class_names"]),
                tuple(answer["image_shape"]),
                int(answer["images"]),
                int(answer["labeled"]),
                int(answer["tested"]),
                str(answer["public_key"]),
            )
            for client, answer in sorted(answers.by_client.items())
        ]
        self._require_enough(len(members), answers.errors)
        _check(members)
        self.members = members

    def ask(
        self,
        action: str,
        config: Mapping[str, Any],
        task: FitTask | None = None,
        arrays: Mapping[str, Tensor] | None = None,
        frozen: Mapping[str, Tensor] | None = None,
    ) -> Answers:
        """Ask all clients to do something; those that do not answer are told of, and left out.

        Args:
            action: What, as `query.label`.
            config: Arguments as JSON can hold them.
            task: What it is about.
            arrays: Weights that are needed.
            frozen: Weights of another network that are needed.

        Raises:
            RuntimeError: Too few clients did it.
        """
        answers = ask(
            self.grid,
            {member.node_id: member.client for member in self.present},
            action,
            dict(config) if task is None else {**config, "task": task.to_json()},
            arrays=arrays,
            frozen=frozen,
            timeout=self.communication.timeout,
        )
        self._require_enough(len(answers.by_client), answers.errors)
        _tell(answers.errors)
        return answers

    def total(self, what: str, task: FitTask | None = None, arrays: Mapping[str, Tensor] | None = None) -> Int64Array:
        """Sum counts over all clients such that nobody sees those of one.

        The masks of pairs of clients only cancel when all of them answer. When one does not, the others are asked
        again, with other masks. Two sums of the same that differ by one client tell its counts, as when a run goes on
        without a client that was counted before it was stopped.

        Args:
            what: Which counts, see Client.counts.
            task: What they are about.
            arrays: Weights that are needed.

        Raises:
            RuntimeError: Too few clients answer, or others in every attempt.
        """
        for _ in range(_ATTEMPTS):
            asked = self.present
            cohort = {str(member.client): member.public_key for member in asked}
            config = {"what": what, "nonce": secrets.token_hex(16), "cohort": cohort}
            answers = self.ask("query.sum", config, task, arrays)
            if answers.by_client.keys() == {member.client for member in asked}:
                return unmask([answers.masked[client] for client in sorted(answers.by_client)])
            left_out = [member for member in asked if member.client not in answers.by_client]
            names = _names([member.client for member in left_out])
            print(f"sum of {what}: {names} did not take part; asking anew", flush=True)
            keys = {member.client: member.public_key for member in left_out}
            self.describe()
            # One that was started again has another key. Who has the same has gone, or would say no once more.
            self.members = [member for member in self.members if keys.get(member.client) != member.public_key]
            self._require_enough(len(self.members), answers.errors)
        msg = f"Expected the same clients to answer twice, got others in {_ATTEMPTS} attempts to sum {what}."
        raise RuntimeError(msg)

    def _require_enough(self, answered: int, errors: Mapping[int, str]) -> None:
        least = self.communication.min_clients
        if answered < least:
            told = f": {_told(errors)}" if errors else ""
            msg = (
                f"Expected answers of at least {least} clients (`communication.min_clients`), got {answered}{told}. "
                "Repair what they say, start more, or lower it; the same command goes on where this one stopped."
            )
            raise RuntimeError(msg)


def _names(clients: Sequence[int]) -> str:
    return ("client " if len(clients) == 1 else "clients ") + ", ".join(map(str, clients))


def _tell(errors: Mapping[int, str]) -> None:
    """Print which clients a run goes on without, and why."""
    for _, error in sorted(errors.items()):
        print(f"{error}; going on without it", flush=True)


def _told(errors: Mapping[int, str]) -> str:
    told = sorted(errors.values())
    more = f" (and {len(told) - _TOLD} more)" if len(told) > _TOLD else ""
    return "; ".join(told[:_TOLD]) + more


def _check(members: Sequence[Member]) -> None:
    """Refuse clients that cannot train one network together."""
    first = members[0]
    for member in members:
        if not member.images:
            msg = f"Expected every client to have images, got none of client {member.client}; leave it out."
            raise ValueError(msg)
        for name in ("class_names", "image_shape"):
            own, theirs = getattr(member, name), getattr(first, name)
            if own != theirs:
                msg = (
                    f"Expected all clients to have the same `{name}`, got {list(own)} from client {member.client} and "
                    f"{list(theirs)} from client {first.client}; bring their data into one form."
                )
                raise ValueError(msg)
    if not sum(member.labeled for member in members):
        msg = (
            f"Expected labelled images, got none from all {len(members)} clients; label some images of at least one "
            "client, or raise `split.label_share`."
        )
        raise ValueError(msg)
