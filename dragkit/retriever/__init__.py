"""The graph retriever: text encoder, ReaRev layers, fact scores, fact sampler and losses."""
