"""Finetuning of adapters beside serving: settings, data, optimizers, checkpoints."""
