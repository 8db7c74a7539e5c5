"""Warnings while a run goes on: one line for what goes wrong, and none again until it was good in between."""

from __future__ import annotations

from collections.abc import Mapping

from eaopd_megatron.config import Recipe
from eaopd_megatron.reporting.alerts import signs


class Warnings:
    """Watches the iterations' metrics for the signs that the recipe's limits leave on."""

    def __init__(self, recipe: Recipe) -> None:
        self._signs = signs(recipe.rollout, recipe.train.updates, recipe.teachers)
        self._said: set[str] = set()

    def of(self, record: Mapping[str, float]) -> list[str]:
        """The lines to say about an iteration's metrics. A metric that is absent changes nothing."""
        lines = []
        for sign in self._signs:
            if sign.metric not in record:
                continue
            value = record[sign.metric]
            if sign.excess(value) <= 0:
                self._said.discard(sign.metric)
            elif sign.metric not in self._said:
                self._said.add(sign.metric)
                lines.append(f"warning: {sign.text} ({value:.3g}): {sign.remedy}")
        return lines
