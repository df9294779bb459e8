"""Sweeps: many runs from one command, that survive what happens to any of them and end in a leaderboard.

Words become points (`points`), points become frozen jobs (`freeze`) that the sweep's folder lists (`ledger`), and a
launcher brings the jobs to their end (`run`).
"""
