"""Checks of the scoreboard."""
