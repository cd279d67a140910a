"""The checker: compares metadata, chunk inventories and queues, and mends what it can.

`run.check` is the entry.  survey -> entries -> tree judge one view of the metadata, chunks judges
what the iods hold, mend plans repairs of records; all of these are pure, and run feeds them.
docs/operations.md#fsck lists the checks, the repairs and the exit codes.
"""
