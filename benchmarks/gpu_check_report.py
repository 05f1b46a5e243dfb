# Copyright 2026 The transformers-bagel authors. Licensed under the Apache License, Version 2.0.
"""What `gpu_check.py` found, as a file and as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_check_part import Part


OUTCOMES = ("passed", "failed", "skipped", "cut off")


def checks_of(part: Part) -> list[dict[str, Any]]:
    """Of each file of tests how many passed, failed, were skipped or cut off, and the error that came nearest to its bound."""
    groups: dict[str, list[str]] = {}
    for item in part.items:
        groups.setdefault(Path(item.partition("::")[0]).stem.removeprefix("test_"), []).append(item)
    checks = []
    for name, items in groups.items():
        results = [part.results[item] for item in items]
        counts = Counter(result["outcome"] for result in results)
        errors = [error for result in results for error in result.get("errors", [])]
        checks.append(
            {
                "name": name.replace("_", " "),
                "about": next((part.abouts[item] for item in items if item in part.abouts), ""),
                **{outcome.replace(" ", "_"): counts[outcome] for outcome in OUTCOMES},
                "worst_error": max(errors, key=_share, default=None),
                "seconds": sum(result["seconds"] for result in results),
            }
        )
    return checks


def is_good(tests: Part, figures: Part) -> bool:
    """No test failed or is unknown, and no figure failed; one may take longer than there is time for."""
    outcomes = {result["outcome"] for result in tests.results.values()}
    return outcomes <= {"passed", "skipped"} and "failed" not in {r["outcome"] for r in figures.results.values()}


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row for each file of tests and for each figure, and a line for whatever did not pass."""
    form = (
        "the small form: tiny models, nothing compiled on a CPU, times that say nothing"
        if report["small"]
        else "the 7B model's sizes"
    )
    versions = ", ".join(f"{name} {report[name]}" for name in ("torch", "transformers", "diffusers"))
    lines = [
        f"{report['device']}, {versions}; {form}; {report['seconds']:.0f} s.",
        "",
        "| | what | result | more |",
        "|---|---|---|---|",
    ]
    lines += [_row(check["name"], check["about"], _counts(check), _error(check)) for check in report["checks"]]
    for section, result in report["sections"].items():
        rows = [row for row in report["figures"] if row["section"] == section]
        lines += [_row(section, row["name"], f"{row['seconds']:.4g} s", _others(row)) for row in rows]
        if result["outcome"] != "passed":
            lines.append(_row(section, "", _marked(result["outcome"]), ""))
    all_results = report["tests"] | report["sections"]
    for outcome in OUTCOMES[1:]:
        by_reason: dict[str, list[str]] = {}
        for item, result in all_results.items():
            if result["outcome"] == outcome:
                by_reason.setdefault(result["reason"], []).append(item)
        if by_reason:
            lines += ["", f"{outcome.capitalize()}:", ""]
            lines += [f"- {reason}: {_names(items, outcome)}" for reason, items in by_reason.items()]
    return "\n".join(lines) + "\n"


def _row(*columns: str) -> str:
    return f"| {' | '.join(column.replace('|', '/') for column in columns)} |"


def _counts(check: Mapping[str, Any]) -> str:
    counts = ((outcome, check[outcome.replace(" ", "_")]) for outcome in OUTCOMES)
    return ", ".join(_marked(f"{count} {outcome}") for outcome, count in counts if count)


def _marked(text: str) -> str:
    return f"**{text}**" if text.endswith(("failed", "cut off")) else text


def _error(check: Mapping[str, Any]) -> str:
    if check["worst_error"] is None:
        return ""
    error, bound = check["worst_error"]
    return f"error {error:.2g}, bound {bound:g}"


def _share(error: Sequence[float]) -> float:
    """Of its bound."""
    found, bound = error
    return found / bound if bound else found


def _others(row: Mapping[str, Any]) -> str:
    others = {
        key: value for key, value in row.items() if key not in ("section", "name", "seconds", "spread", "peak_gb")
    }
    texts = [f"peak {row['peak_gb']:.1f} GB"]
    texts += [
        f"{key.replace('_', ' ')} {f'{value:.4g}' if isinstance(value, float) else value}"
        for key, value in others.items()
    ]
    return ", ".join(texts)


def _names(items: Sequence[str], outcome: str) -> str:
    """What failed is named in full, to be run again."""
    if outcome == "failed":
        return ", ".join(f"`{item}`" for item in items)
    names = Counter(
        item.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ") for item in items
    )
    return ", ".join(f"{name} ({count})" if count > 1 else name for name, count in names.items())
