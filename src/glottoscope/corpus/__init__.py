"""Text in: documents and aligned sentences, token blocks, byte-safe display, code switching, and the planted world."""
