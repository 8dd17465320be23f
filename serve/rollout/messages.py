"""What webhooks were told of a rollout, for a terminal: delivered, waiting, or a dead letter and why.

Reads nothing, decides nothing.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from serve.rollout.view import when
from serve.state.outbox import Message


def messages_table(messages: list[Message]) -> Table:
    """One line a message, in the order in which they were written."""
    table = Table(header_style="bold", title="webhooks", title_justify="left")
    for name in ("at", "event", "hook", "tries", "what became of it"):
        table.add_column(name, no_wrap=name != "what became of it", overflow="fold")
    for m in messages:
        table.add_row(when(m.at), m.event, Text(m.hook.label), str(m.tries), Text(became(m)))
    return table


def became(message: Message) -> str:
    """One sentence on a message's fate."""
    if message.dead:
        return f"dead letter: {message.error}"
    if message.done_at is not None:
        return f"delivered {when(message.done_at)}"
    if message.error is not None:
        return f"waits, next try {when(message.next_at)}: {message.error}"
    return "waits"
