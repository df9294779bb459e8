"""``optimizer=adam_mini``: what it keeps, and a run."""

from __future__ import annotations

SMALL = ["model=tiny", "hardware=cpu", "adapter=full", "optimizer=adam_mini"]


def test_keeps_half_of_what_adamw_keeps(tmp_path):
    from ftrun.conformance import _small_model, _small_run, _steps

    run = _small_run(tmp_path, SMALL)
    model = _small_model(run)
    made = run.cfg.optimizer.build(model, run)
    _steps(model, run, made, 1)
    kept = sum(value.nbytes for state in made.state.values() for value in state.values() if hasattr(value, "nbytes"))
    config, weights = model.config, dict(model.named_parameters())
    heads = config.num_attention_heads + config.num_key_value_heads
    numbers = 0
    for name, weight in weights.items():
        if weight.ndim == 1:
            numbers += 1
        elif not name.endswith(("q_proj.weight", "k_proj.weight")):
            numbers += len(weight)
    numbers += heads * config.num_hidden_layers
    assert kept == 4 * (sum(weight.numel() for weight in weights.values()) + numbers)


def test_a_run_lowers_the_loss(ftrun):
    words = ["optimizer.lr=1e-2", "train.micro_batch_size=4", "train.max_steps=12", "train.log_every=1"]
    done = ftrun(*SMALL, *words, "optimizer.layerwise=true").sees()
    assert done.losses[-1] < 0.9 * done.losses[0]
