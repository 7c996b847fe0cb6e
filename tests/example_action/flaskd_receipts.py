"""An action for flaskd: prints a receipt for each stop into a file.

::

    cleanup: {policies: {receipt: {use: receipts.print, with: {path: receipts.txt, copies: 2}}}}
"""

from pathlib import Path

from pydantic import Field

from flaskd.cleanup import Action, StepContext, StepFailedError
from flaskd.config import Phase, Section


class ReceiptFields(Section):
    """Fields of ``receipts.print``; a wrong one is a fault with its line and column."""

    path: Path = Field(description="The file to add to.")
    copies: int = Field(default=1, ge=1, le=9, description="How many receipts to print.")


def print_receipt(context: StepContext, fields: ReceiptFields) -> str:
    """Add a line for each copy; what is raised fails the step, and what is returned is its detail in the log."""
    try:
        with fields.path.open("a", encoding="utf-8") as file:
            file.write(f"{context.policy}: stopped for {context.reason_text}\n" * fields.copies)
    except OSError as error:
        raise StepFailedError(f"cannot print to {fields.path}: {error.strerror}") from error
    return f"{fields.copies} printed"


receipts = Action("receipts.print", ReceiptFields, Phase.FINAL, print_receipt)
