"""What every room uses: trees of tensors, records, statuses, warnings; nothing that knows an equation."""

__all__: list[str] = []
