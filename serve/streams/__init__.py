"""Audio streams over a WebSocket, answered window by window while the audio arrives.

`samples` turns bytes into a waveform, `window_buffer` cuts windows out of it, `inbox` holds what has arrived, and `session` is one
connection.
"""

CLOSE_CODE = 4000
"""The close code after an error is this number plus the status of the error."""
