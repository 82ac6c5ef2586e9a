"""Print the table of docs/context_parallel.md."""

from longlora.torch.context_parallel.costs import table

if __name__ == "__main__":
    print(table())
