"""BasePreparer: the part of a Preparer that all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from models.base import EmbeddingInput, InputTooLong, InvalidInput, ModelInfo, PreparedInput, Refusal

# What a family makes of an input before it is tokenised, and what its tokenizer makes of a plan.
Plan = TypeVar("Plan")
Fitted = TypeVar("Fitted")


class BasePreparer(ABC, Generic[Plan, Fitted]):
    """Prepares inputs in three steps: plan, fit and assemble. A plan costs little, and refuses most inputs that cannot be
    embedded; plans are tokenised within their limits, many in one call; and the prepared input is assembled of both."""

    info: ModelInfo

    @abstractmethod
    def _plan(self, item: EmbeddingInput) -> Plan:
        """Plans one input. Raises InvalidInput."""

    @abstractmethod
    def _fit(self, plans: Sequence[Plan], limits: Sequence[int], truncate: Sequence[bool]) -> Sequence[Fitted | Refusal]:
        """Tokenises each plan within its limit of tokens, or says why it is refused; `truncate[i]` allows to cut plan i's
        text."""

    @abstractmethod
    def _assemble(self, item: EmbeddingInput, plan: Plan, fitted: Fitted) -> PreparedInput:
        """Returns the prepared input. Raises InvalidInput."""

    def prepare(self, item: EmbeddingInput) -> PreparedInput:
        """Prepares one input. Raises InvalidInput, InputTooLong among it."""
        plan = self._plan(item)
        (fitted,) = self._fit([plan], [self._limit(item)], [item.truncate])
        if isinstance(fitted, Refusal):
            raise InputTooLong(fitted.message)
        return self._assemble(item, plan, fitted)

    def prepare_all(self, items: Sequence[EmbeddingInput]) -> list[PreparedInput | Refusal]:
        """Prepares each input as `prepare` does, or says why it is refused; all texts are tokenised in one call."""
        results: dict[int, PreparedInput | Refusal] = {}
        plans: dict[int, Plan] = {}
        for index, item in enumerate(items):
            try:
                plans[index] = self._plan(item)
            except InvalidInput as error:
                results[index] = Refusal(str(error))
        fitted = self._fit(
            list(plans.values()), [self._limit(items[index]) for index in plans], [items[index].truncate for index in plans]
        )
        for (index, plan), found in zip(plans.items(), fitted, strict=True):
            results[index] = found if isinstance(found, Refusal) else self._assembled(items[index], plan, found)
        return [results[index] for index in range(len(items))]

    def _assembled(self, item: EmbeddingInput, plan: Plan, fitted: Fitted) -> PreparedInput | Refusal:
        try:
            return self._assemble(item, plan, fitted)
        except InvalidInput as error:
            return Refusal(str(error))

    def _limit(self, item: EmbeddingInput) -> int:
        """Returns the most tokens that an input may have: its own limit, and never more than the model reads."""
        return self.info.max_tokens if item.max_tokens is None else min(item.max_tokens, self.info.max_tokens)
