"""Abuse of a running server: cancelling, two clients, kill -9, full disks and replaced files."""
