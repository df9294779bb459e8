"""What Hydra looks up here: ``hydra/launcher=local``, ``hydra/sweeper=grid`` and their like."""
