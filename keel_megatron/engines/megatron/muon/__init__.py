"""Muon: orthogonalised momentum for the blocks' weight matrices."""
