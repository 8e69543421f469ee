"""The synthetic anomalies that training makes (paper, section III-D): textures, masks, foregrounds."""
