"""LISA as an option."""

from __future__ import annotations


def test_more_layers_than_there_are_are_refused(ftrun):
    done = ftrun("model=tiny", "adapter=full", "optimizer=lisa", "optimizer.n_layers=3", "train.max_steps=1").sees(2)
    assert "optimizer.n_layers: 2 layers of the model train, of which 3 cannot be drawn" in done.err
