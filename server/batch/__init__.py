"""Batch jobs that survive the process: files in, one answer or error per line, files out.

No HTTP here: the routes and `sl-serve run-batch` use the same `BatchService`. A job's way:

    files (upload) -> batches (validating) -> clerk: validation, one pass -> lines
    -> feeder: claimed, into the engine, results committed -> clerk: rendered into files

The one truth is a SQLite file. Whatever else lies in the folder holds input and rendered output.
"""
