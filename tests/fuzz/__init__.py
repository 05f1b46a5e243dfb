"""Broken files, configurations, adapters, images, messages and arguments, made from a seed."""
