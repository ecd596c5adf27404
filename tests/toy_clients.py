"""Clients that are functions, and a Grid that reaches them."""

from collections.abc import Callable, Iterable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated import wire
from federated.in_process import InProcessGrid

# (client, what it is asked) -> its answer
Answer = Callable[[int, wire.Instruction], RecordDict]


def recognises_half(client: int, instruction: wire.Instruction) -> RecordDict:
    """Client k has 2 k test images."""
    del instruction
    return wire.evaluated(client, client, 2 * client)


class ToyGrid(InProcessGrid):
    """Clients that answer with a function.

    Args:
        train: How they train.
        num_clients: How many there are.
        evaluate: How they evaluate.
        lost: See InProcessGrid.
        backwards: Whether answers arrive in the other order.

    Attributes:
        heard: (type of the message, client, instruction), in order.
    """

    def __init__(
        self,
        train: Answer,
        num_clients: int,
        evaluate: Answer = recognises_half,
        lost: Callable[[Message], bool] | None = None,
        backwards: bool = False,
    ) -> None:
        self.heard: list[tuple[str, int, wire.Instruction]] = []
        self.backwards = backwards
        app = ClientApp()
        app.train()(self._answering("train", train))
        app.evaluate()(self._answering("evaluate", evaluate))
        super().__init__(app, num_clients, lost)

    def _answering(self, kind: str, answer: Answer) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            client = int(context.node_config["partition-id"])
            instruction = wire.read_instruction(message.content)
            self.heard.append((kind, client, instruction))
            return Message(answer(client, instruction), reply_to=message)

        return handle

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        return reversed(replies) if self.backwards else iter(replies)

    def clients(self, kind: str, server_round: int) -> list[int]:
        """Who was asked in a round."""
        return [client for name, client, asked in self.heard if name == kind and asked.server_round == server_round]
