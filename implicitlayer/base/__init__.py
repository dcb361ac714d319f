"""What every room uses: trees of tensors, records, statuses; nothing that knows an equation."""

__all__: list[str] = []
