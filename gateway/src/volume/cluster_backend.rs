//! The real backend: objects in the cluster, through the cluster client.
