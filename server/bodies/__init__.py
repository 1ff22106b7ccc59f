"""The JSON bodies clients send. Strict: true is not 1 and "5" is not 5.

`null` means the default everywhere, as clients send it for whatever they leave out. Unknown fields
are accepted. Limits that depend on the model or on settings are in `server/params.py`.
"""
