"""Elastic: one training run, a family of nested hybrid Mamba-2 / attention / MLP language models."""
