"""Routes, and what happens around a request: access, logs, metrics and the web page."""
