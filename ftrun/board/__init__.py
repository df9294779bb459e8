"""What a sweep has come to: leaderboard, report, the winner, and what stays on disk; all from the jobs' own folders.

Jobs become rows (`rows`), rows become arms that are ranked and compared (`arms`, `statistics`); these are written as
``leaderboard.{md,csv,json}`` (`tables`) and ``report.html`` (`report`, `pictures`). The best arm becomes an experiment
(`winner`), and the weights of the others may go (`keep`).
"""

from __future__ import annotations

from pathlib import Path

from ftrun.board import arms, rows
from ftrun.board.arms import Arm, Board, Table
from ftrun.board.rows import Row

__all__ = ["Arm", "Board", "Row", "Table", "load", "write", "write_report"]

REPORT = "report.html"


def load(folder: Path) -> Board:
    """Return what a sweep has come to so far."""
    return arms.board(folder, rows.read(folder))


def write(folder: Path) -> Board:
    """Write a sweep's leaderboard as it stands, and return what is in it."""
    from ftrun.board import tables

    board = load(folder)
    tables.write(board)
    return board


def write_report(board: Board) -> Path:
    """Write ``report.html``."""
    from ftrun import record
    from ftrun.board.report import render

    path = board.folder / REPORT
    record.write_whole(path, render(board))
    return path
