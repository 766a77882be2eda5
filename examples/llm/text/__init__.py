"""Prompts and answers: tokens, templates, sampling, stopping, chat."""
