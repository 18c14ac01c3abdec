"""What the log says of the generations of a request, when the whole of it has ended."""

from typing import Any

__all__ = ["Record", "end_of"]


def end_of(finish_reason: str) -> str:
    """How log and metrics name the end of a generation: as vLLM does."""
    return "abort" if finish_reason == "cancelled" else finish_reason


class Record:
    """Tokens, times and ends of one request; of several generations together.

    Writes prompt_tokens, generated_tokens, queue_s (the longest), first_token_s (the first; both in seconds, None if it
    did not come to that) and finish_reason (each that occurred) into `facts`.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        self._facts = facts
        self._n_runs = 0
        self._tokens: dict[int, int] = {}
        self._ends: dict[int, str] = {}
        self._failed = False

    def begin(self, n_runs: int, n_prompt: int) -> None:
        """`n_prompt`: tokens of all prompts."""
        self._n_runs = n_runs
        self._facts.update(prompt_tokens=n_prompt, generated_tokens=0, queue_s=None, first_token_s=None)

    def token(self, number: int, seconds: float) -> None:
        """A token of a run, so many seconds after the request."""
        self._tokens[number] = self._tokens.get(number, 0) + 1
        if self._facts["first_token_s"] is None:
            self._facts["first_token_s"] = seconds

    def ended(self, number: int, reason: str, n_tokens: int, seconds: float, queue_s: float) -> None:
        """A run has ended, so many seconds after the request, for a `reason` as answers have it."""
        if n_tokens > 0 and number not in self._tokens:  # the only one has no text
            self.token(number, seconds)
        self._tokens[number] = n_tokens
        self._ends[number] = end_of(reason)
        self._facts["queue_s"] = max(self._facts["queue_s"] or 0.0, queue_s)

    def failed(self) -> None:
        """The request ends with an error."""
        self._failed = True

    def close(self) -> str:
        """Nothing more will come. Returns how those ended that have not been told of: "abort" or "error"."""
        other = "error" if self._failed else "abort"
        left = [other] if self.n_left else []
        self._facts["generated_tokens"] = sum(self._tokens.values())
        self._facts["finish_reason"] = ",".join(sorted({*self._ends.values(), *left}))
        return other

    @property
    def n_left(self) -> int:
        """Runs that have not ended."""
        return self._n_runs - len(self._ends)
