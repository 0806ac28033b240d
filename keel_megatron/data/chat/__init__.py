"""Conversations: messages, chat templates and their tokens. No torch."""
