"""The HTTP edge."""

VERSION = "0.1.0"
