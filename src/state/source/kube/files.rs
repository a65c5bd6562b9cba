//! What the files say: tokens, kubeconfigs, certificates. Each is bounded, and what is wrong with it is said in words.

use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::config::{AuthInfo, Cluster as ClusterEntry, Kubeconfig};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};
use secrecy::ExposeSecret as _;

use crate::state::problem::{one_line, quote};

/// Largest file of credentials.
pub(super) const MAX_FILE: u64 = 1 << 20;

/// Symbolic links are followed: Kubernetes swaps a whole volume by one.
pub(super) fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let open = || {
        let file = fs::File::open(path)?;
        let mut bytes = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        Ok::<_, io::Error>(bytes)
    };
    match open() {
        Ok(bytes) if bytes.len() as u64 > MAX_FILE => Err(format!("more than {MAX_FILE} bytes")),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

pub(super) fn read_token(path: &Path) -> Result<String, String> {
    let text = read_file(path).and_then(|bytes| String::from_utf8(bytes).map_err(|_| "no text".to_owned()));
    match text {
        Ok(text) if text.trim().is_empty() => Err(format!("{} is empty", path.display())),
        Ok(text) => Ok(text),
        Err(reason) => Err(format!("{}: {reason}", path.display())),
    }
}

/// What the current context of a kubeconfig names: its cluster and its user.
pub(super) fn read_kubeconfig(path: &Path) -> Result<(ClusterEntry, AuthInfo), String> {
    read_file(path)?; // kube's own reader has no bound
    let config = Kubeconfig::read_from(path).map_err(|error| one_line(&error.to_string()))?;
    let current = config.current_context.as_deref().unwrap_or_default();
    let context = config.contexts.iter().find(|context| context.name == current);
    let context = context.and_then(|context| context.context.as_ref());
    // A kubelet's often has one cluster and nothing else worth naming.
    let cluster = match context {
        Some(context) => config.clusters.iter().find(|cluster| cluster.name == context.cluster),
        None if config.clusters.len() == 1 => config.clusters.first(),
        None => return Err(format!("its current-context {} is not in it", quote(current))),
    };
    let cluster =
        cluster.and_then(|cluster| cluster.cluster.clone()).ok_or("the context's cluster is not in it")?;
    let user = context.and_then(|context| context.user.as_deref());
    let user = config.auth_infos.iter().find(|entry| Some(entry.name.as_str()) == user);
    Ok((cluster, user.and_then(|entry| entry.auth_info.clone()).unwrap_or_default()))
}

pub(super) fn has_authority(cluster: &ClusterEntry) -> bool {
    cluster.certificate_authority.is_some() || cluster.certificate_authority_data.is_some()
}

pub(super) fn authority_pem(cluster: &ClusterEntry) -> Result<Vec<u8>, String> {
    if cluster.insecure_skip_tls_verify == Some(true) {
        return Err(
            "insecure-skip-tls-verify: Warren always verifies; name the certificate-authority".to_owned()
        );
    }
    if cluster.proxy_url.is_some() {
        return Err("proxy-url is not supported".to_owned());
    }
    let data = cluster.certificate_authority_data.as_deref();
    data_or_file("certificate-authority", data, cluster.certificate_authority.as_deref())?
        .ok_or_else(|| "it names no certificate-authority".to_owned())
}

pub(super) type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

pub(super) fn identity(user: &AuthInfo) -> Result<Option<Identity>, String> {
    if user.exec.is_some() || user.auth_provider.is_some() {
        return Err(
            "its user needs another program (exec, auth-provider); give one with a token or a client \
                    certificate"
                .to_owned(),
        );
    }
    let data = user.client_certificate_data.as_deref();
    let certificate = data_or_file("client-certificate", data, user.client_certificate.as_deref())?;
    let data = user.client_key_data.as_ref().map(|data| data.expose_secret());
    let key = data_or_file("client-key", data, user.client_key.as_deref())?;
    let (Some(certificate), Some(key)) = (certificate, key) else { return Ok(None) };
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&certificate).collect();
    let chain = chain.map_err(|error| format!("client-certificate: {error}"))?;
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| format!("client-key: {error}"))?;
    Ok(Some((chain, key)))
}

fn data_or_file(what: &str, data: Option<&str>, file: Option<&str>) -> Result<Option<Vec<u8>>, String> {
    match (data, file) {
        (Some(data), _) => {
            STANDARD.decode(data.trim()).map(Some).map_err(|_| format!("{what}-data is not base64"))
        }
        (None, Some(file)) => {
            read_file(Path::new(file)).map(Some).map_err(|reason| format!("{file}: {reason}"))
        }
        (None, None) => Ok(None),
    }
}

pub(super) fn add_roots(roots: &mut RootCertStore, pem: &[u8]) -> Result<(), String> {
    let before = roots.len();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| format!("not PEM: {error}"))?;
        // One of several that rustls cannot use does not spoil the others.
        let _ = roots.add(certificate);
    }
    match roots.len() > before {
        true => Ok(()),
        false => Err("no usable certificate of an authority is in it".to_owned()),
    }
}

pub(super) fn tls(roots: RootCertStore, identity: Option<Identity>) -> Result<Arc<ClientConfig>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("client-certificate: {error}"))?,
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
