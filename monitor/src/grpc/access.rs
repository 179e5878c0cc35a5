//! What each role of a certificate may ask of a monitor.

use gabion_common::tls::Role;

/// See [`gabion_common::grpc::Access`]. What is not listed is refused.
pub(super) fn rule(path: &str, role: Role) -> bool {
    use Role::{Admin, Gateway, Host, Monitor, Osd, Viewer};
    let (service, method) = path.trim_start_matches('/').split_once('/').unwrap_or_default();
    let Some(service) = service.strip_prefix("gabion.v1.") else {
        // Health and reflection say nothing about this cluster.
        return service.starts_with("grpc.");
    };
    match service {
        "MapService" | "StatusService" => true,
        "MonitorPeerService" => role == Monitor,
        "OsdService" => role == Osd,
        "HostService" => matches!(role, Gateway | Host),
        "ClientService" => matches!(role, Gateway | Admin),
        "AdminService" => match role {
            Admin => true,
            // Formats its own disk.
            Osd => method == "AddOsd",
            // The boot files of a guest; the size of a volume that is attached.
            Host | Gateway => method == "GetVolume",
            Viewer => ["List", "Get"].iter().any(|verb| method.starts_with(verb)),
            _ => false,
        },
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_service_has_a_rule_and_nobody_may_be_somebody_else() {
        let set = gabion_proto::pb::FILE_DESCRIPTOR_SET;
        for service in ["Admin", "Client", "Host", "Map", "MonitorPeer", "Osd", "Status"] {
            let name = format!("{service}Service");
            assert!(set.windows(name.len()).any(|w| w == name.as_bytes()), "{name} is not in the API");
            let path = format!("/gabion.v1.{name}/Any");
            assert!(Role::ALL.into_iter().any(|r| rule(&path, r)), "nobody may call {name}");
        }
        for role in Role::ALL {
            assert_eq!(rule("/gabion.v1.OsdService/Boot", role), role == Role::Osd);
            assert_eq!(rule("/gabion.v1.MonitorPeerService/Vote", role), role == Role::Monitor);
            assert_eq!(rule("/gabion.v1.AdminService/RemoveVolume", role), role == Role::Admin);
            assert!(rule("/gabion.v1.StatusService/WatchRebuilds", role));
            for odd in ["", "/", "//", "/gabion.v1.OsdService", "/gabion.v1.NewService/X", "/other.v1.X/Y"] {
                assert!(!rule(odd, role), "{odd}");
            }
        }
        assert!(rule("/gabion.v1.AdminService/AddOsd", Role::Osd));
        assert!(!rule("/gabion.v1.AdminService/AddExport", Role::Host));
        assert!(rule("/gabion.v1.AdminService/GetVolume", Role::Gateway));
        assert!(rule("/gabion.v1.AdminService/ListOsds", Role::Viewer));
        assert!(!rule("/gabion.v1.AdminService/OutOsd", Role::Viewer));
        assert!(rule("/gabion.v1.AdminService/ListScrubs", Role::Viewer));
        assert!(!rule("/gabion.v1.AdminService/StartScrub", Role::Viewer));
        assert!(!rule("/gabion.v1.AdminService/SetScrub", Role::Osd));
    }
}
