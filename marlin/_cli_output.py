"""What the ``marlin`` command prints for people: reports as tables and sentences."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from marlin._conversion_report import ConversionReport
from marlin.verify import VerifyReport

SHOWN_MISMATCHES = 20


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first being the head, as columns; numbers are set to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = [
        all(row[i].replace(".", "").lstrip("-").isdigit() for row in rows[1:])
        for i in range(len(widths))
    ]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def print_conversion(report: ConversionReport) -> None:
    asked_for_sparse = any(layer.sparse or layer.dense_reason for layer in report.layers)
    if report.dry_run:
        head = ["layer", "K", "N", "group", "zeros", "order", "scales", "MB before", "after"]
        rows = [
            [
                layer.name,
                str(layer.in_features),
                str(layer.out_features),
                "one" if layer.group_size == -1 else str(layer.group_size),
                "yes" if layer.zeros else "no",
                "act" if layer.act_order else "plain",
                layer.dtype,
                _megabytes(layer.bytes_before),
                _megabytes(layer.bytes_after),
            ]
            for layer in report.layers
        ]
        if asked_for_sparse:
            head.append("weights")
            for row, layer in zip(rows, report.layers, strict=True):
                row.append("2:4" if layer.sparse else "dense")
        print(_table([head, *rows]))
    weights = sum(layer.in_features * layer.out_features for layer in report.layers)
    bits = 8 * sum(layer.bytes_after for layer in report.layers) / weights
    counts = f"{len(report.layers)} layers ({bits:.3f} bits per weight)"
    others = f"{report.other_tensors} other tensors"
    sizes = f"{_megabytes(report.bytes_before)} MB -> {_megabytes(report.bytes_after)} MB"
    files = f"{len(report.shards)} shard{'s' if len(report.shards) != 1 else ''}"
    exported = report.destination_format != "marlin"
    verb, as_what = ("export", f", as {report.destination_format}") if exported else ("convert", "")
    if report.dry_run:
        print(
            f"would {verb} {counts} and copy {others}: {sizes}, {files}{as_what}; nothing was "
            "written"
        )
    else:
        print(
            f"{verb}ed {counts} and copied {others}: {sizes}, {files}{as_what}, "
            f"{report.seconds:.1f} s"
        )
        print(f"written to {report.destination}")
    if asked_for_sparse:
        dense = [layer for layer in report.layers if not layer.sparse]
        print(f"2:4 sparse: {len(report.layers) - len(dense)} of {len(report.layers)} layers")
        for layer in dense:
            print(f"dense: {layer.name}: {layer.dense_reason}")
    for name in report.skipped_files:
        print(f"not copied: {name}")
    for warning in report.warnings:
        print(f"marlin: warning: {warning}", file=sys.stderr)


def print_verification(report: VerifyReport) -> None:
    head = ["layer", "weights", "result"]
    rows = [[r.name, str(r.weights), "different" if r.problem else "equal"] for r in report.layers]
    print(_table([head, *rows]))
    print(f"{report.other_tensors} other tensors compared byte by byte")
    if report.equal:
        print(
            f"every tensor of {report.destination} holds exactly what {report.source} holds (other "
            "files are not compared)"
        )
    for mismatch in report.mismatches[:SHOWN_MISMATCHES]:
        print(f"marlin: different: {mismatch}", file=sys.stderr)
    if len(report.mismatches) > SHOWN_MISMATCHES:
        print(f"marlin: and {len(report.mismatches) - SHOWN_MISMATCHES} more", file=sys.stderr)


def print_plans(plans: Sequence[dict[str, Any]]) -> None:
    """A table with the kernels' names in place of their descriptions, and the reasons below it."""
    keys = list(dict.fromkeys(key for plan in plans for key in plan))
    rows = [
        [str(v.get("name", v) if isinstance(v := plan.get(key, ""), dict) else v) for key in keys]
        for plan in plans
    ]
    print(_table([keys, *rows]))
    kernels = [plan["kernel"] for plan in plans if isinstance(plan.get("kernel"), dict)]
    for name, reason in {k.get("name"): k["reason"] for k in kernels if "reason" in k}.items():
        print(f"{name}: {reason}")
