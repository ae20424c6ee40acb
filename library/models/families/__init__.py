"""One file per model family; each satisfies `library.models.family.ModelFamily`."""
