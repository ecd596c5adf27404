"""Server and clients in this process, one after the other: Flower's apps without Ray and without a network."""

from collections.abc import Callable, Iterable
from logging import getLogger
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_LOGGER = getLogger(__name__)
_RUN_ID = 1
_SERVER = 1
# So that nobody takes a node's id for the client's number.
_FIRST_NODE = 1001


class InProcessGrid(Grid):
    """A Grid whose nodes are functions: a message is answered before the next one is sent.

    What a client raises becomes an answer with an error, as in Flower's engines.

    Args:
        client_app: What every client runs.
        num_clients: Number of clients.
        lost: Whether a client vanishes when it gets a message, and answers nothing; for rehearsals.
    """

    def __init__(self, client_app: ClientApp, num_clients: int, lost: Callable[[Message], bool] | None = None) -> None:
        self._client_app = client_app
        self._lost = lost
        self._run = Run.create_empty(run_id=_RUN_ID)
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + number: Context(
                run_id=_RUN_ID,
                node_id=_FIRST_NODE + number,
                node_config={"partition-id": number, "num-partitions": num_clients},
                state=RecordDict(),
                run_config={},
            )
            for number in range(num_clients)
        }
        # Without it Flower writes no message; its own engines set it in the same place.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN_ID, _SERVER, 1

    def set_run(self, run: Run) -> None:
        """Set the run.

        Args:
            run: Flower's record of it.
        """
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's record of the run."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as old strategies do.

        Args:
            content: Its records.
            message_type: What the client does with it.
            dst_node_id: The node.
            group_id: The round.
            ttl: Seconds that it is valid for.
        """
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes."""
        return [NodeInfo(node_id=node) for node in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Let the clients do what they are asked to.

        Args:
            messages: A message to each.

        Returns:
            The messages' ids.
        """
        ids = []
        for message in messages:
            ids.append(str(uuid4()))
            message.metadata.__dict__["_message_id"] = ids[-1]  # Flower's grids set it the same way
            if self._lost is None or not self._lost(message):
                self._replies[ids[-1]] = self._answer(message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out answers, once.

        Args:
            message_ids: Ids of the messages that were sent.
        """
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the answers.

        Args:
            messages: A message to each client.
            timeout: Not looked at: every client answers at once or never.
        """
        del timeout
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message:
        try:
            return self._client_app(message, self._contexts[message.metadata.dst_node_id])
        except Exception as error:  # as in Flower's engines: nothing of a client stops the server
            _LOGGER.exception("a client failed")
            reason = f"{type(error).__name__}: {error}"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def run(
    server_app: ServerApp,
    client_app: ClientApp,
    num_clients: int,
    lost: Callable[[Message], bool] | None = None,
) -> None:
    """Run a server and its clients in this process.

    Args:
        server_app: The server.
        client_app: What every client runs.
        num_clients: Number of clients.
        lost: See InProcessGrid.
    """
    context = Context(run_id=_RUN_ID, node_id=_SERVER, node_config={}, state=RecordDict(), run_config={})
    server_app(InProcessGrid(client_app, num_clients, lost), context)
