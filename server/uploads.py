"""Multipart forms with one file, read as they come: the file is never whole in memory."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sl_serve.errors import RequestError

MAX_FIELDS = 20
MAX_FIELD_BYTES = 4096  # of all fields but the file
FILE_FIELD = "file"


class UploadForm:
    """Fed with the body's pieces; `fields` and `filename` are known once they have passed."""

    def __init__(self, content_type: str) -> None:
        """Raises RequestError unless `content_type` is a multipart form's."""
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise RequestError(
                "The body should be a form, 'multipart/form-data' with a boundary.", "file"
            )
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.ended = False
        self._header = b""
        self._value = b""
        self._disposition: bytes = b""
        self._name: str | None = None  # of the field that is being read; None: the file
        self._n_fields = 0
        self._field_bytes = 0
        self._file_data: list[bytes] = []
        callbacks = {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._data,
            "on_end": self._ends,
        }
        try:
            self._parser = MultipartParser(boundary, callbacks)  # type: ignore[arg-type]
        except FormParserError as error:
            raise _malformed(error) from None

    def feed(self, chunk: bytes) -> bytes:
        """The file's bytes in this piece of the body."""
        self._file_data.clear()
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise _malformed(error) from None
        return b"".join(self._file_data)

    def finish(self) -> None:
        """Raises RequestError for a form that was cut off or has no file."""
        if not self.ended:
            raise RequestError("The form ends before its last boundary.", "file")
        if self.filename is None:
            raise RequestError("'file' is required: the field with the file.", "file")

    def _part_begins(self) -> None:
        self._n_fields += 1
        if self._n_fields > MAX_FIELDS:
            raise RequestError(f"The form has more than {MAX_FIELDS} fields.")
        self._disposition = self._header = self._value = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if name != FILE_FIELD:
            self._name = name
            self.fields[name] = ""
            self._count(len(name))
            return
        if self.filename is not None:
            raise RequestError("The form has two fields named 'file'; send one.", "file")
        self._name = None
        self.filename = options.get(b"filename", b"upload").decode("utf-8", "replace")

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._file_data.append(data[start:end])
            return
        self._count(end - start)
        self.fields[self._name] += data[start:end].decode("utf-8", "replace")

    def _count(self, n_bytes: int) -> None:
        self._field_bytes += n_bytes
        if self._field_bytes > MAX_FIELD_BYTES:
            raise RequestError(
                f"The form's fields beside 'file' have more than {MAX_FIELD_BYTES} bytes."
            )

    def _ends(self) -> None:
        self.ended = True


def _malformed(error: Exception) -> RequestError:
    return RequestError(f"The body is not a valid form: {error}.", "file")
